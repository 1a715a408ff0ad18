"""Caption providers that ship: each a module with `describe(pictures, options)`, which yields one caption for each picture, in order.

They run in the trainer environment's interpreter, so they import nothing of ours. `options`: `model` (a folder or a repository, or "").
"""
