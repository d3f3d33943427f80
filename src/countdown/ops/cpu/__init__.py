"""The CPU backend: a library of C++ kernels, sources in `csrc/`, that is called through ctypes.

`library` finds and describes it; `backend` and `dense_ops` fill in its calls, `small` those of small operations.
"""
