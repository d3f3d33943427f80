"""The Triton backend, for CUDA and ROCm devices.

`kernels` is what runs on the device, over functions of `deciders`, which say what is active, and of `loaders`, which
read weights. `launch` chooses shapes of launches, `ffn` is the host's side, `backend` says what is taken. Importing
this package loads none of them; `countdown.ops.backends` registers the backend where it can run.

A selector is a pair of functions in `deciders` and a row of `ffn.DECIDERS`, a weight format a function in `loaders` and
a row of `ffn.FORMATS`; `backend.Triton` names both.
"""
