"""The CPU backend: a library of C++ kernels, sources in `csrc/`, that is called through ctypes.

`library` finds and describes it, `ops` and `dense_ops` are the host's side of the schemas. Importing this package loads
none of them; `countdown.ops.backends` registers it where the library was built.
"""
