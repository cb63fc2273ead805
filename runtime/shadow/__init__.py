"""Dry runs of emitted programs: any rank of any cluster in one process, on tensors without values.

`child` is the process that runs a program; what it found comes back as `result.RankResult`. The rest is torch's and runs in
that process alone: `fakes` (process groups and answers without a cluster), `recorder` (bytes, FLOPs, collectives), `standins`
(what a machine without Transformer Engine lacks, and balanced routing), `driver` (two steps of a program's job).
"""
