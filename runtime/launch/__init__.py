"""Executes a bundle's stages in the manifest's order: resume, logs, failures, status. Knows no stage, imports no torch.

`bundle` reads the contract, `identity` decides what is unchanged, `state` keeps what is known on disk, `local` starts processes
(through `torchrun` and `child`, each run as a process of its own), `execute` is the loop, `show` prints.
"""
