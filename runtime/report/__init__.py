"""plan.json, manifest.json and what a run left, as one HTML page that opens without a network. Imports no torch.

`curves` reads, `charts` draws, `page` writes.
"""
