"""Mixed adapters and attention in machine code of this project's own, for CPUs that multiply bfloat16.

`..._program` write it, `machine_code` compiles it, `products` and `attention` call it.
"""
