"""The equations, as pure functions: flow matching, losses, diagnostics; and the settings and sampling plans that are asked of them.

Nothing here holds a network or reads a file. Imports `machine`, `digits` and `network`.
"""
