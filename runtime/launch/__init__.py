"""Executes a bundle's stages in the manifest's order: resume, logs, failures, status. Knows no stage, imports no torch.

`bundle` reads the contract, `identity` (with `saved`, for models of other bundles) decides what is unchanged, `state` keeps what
is known on disk, `lock` keeps others out and ends what a killed run left, `packages` looks for what is not installed, `local`
starts processes (through `torchrun` and `child`, each run as a process of its own), `failure` says how they ended, `previous`
keeps what earlier attempts left, `execute` is the loop, `status` reads it all, `show` prints.
"""
