"""`dry-run`: what can be known of a bundle before a cluster is rented.

`planned` is what its plan says, `execute` runs its programs in shadow (a child process each; no torch here), `compare` puts the
two side by side, `verdict` says whether they fit, `show` prints it.
"""
