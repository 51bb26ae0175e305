"""What the Triton kernels of all ops share.

``device``  functions that kernels call: rounding, the quantizing epilogue, GELU, the side branch, 4-bit weights
``fixup``   what needs whole rows, behind tiles that hold parts of them, in one launch
``host``    launching: who may run where, row views, the record of launches that tests and warm-up read
``aot``     compiling recorded launches ahead of time, for any GPU, without one

The kernels themselves live beside their op's schema and oracle (``ops/<op>/triton.py``).
"""
