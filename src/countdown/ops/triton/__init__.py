"""The Triton backend, for CUDA and ROCm devices.

`kernels` is what runs on the device, `launch` chooses shapes of launches, `ops` are the host's side of the schemas.
Importing this package loads none of them; `countdown.ops.backends` registers it where it can run.
"""
