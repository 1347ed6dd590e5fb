"""Mixed adapters and attention in machine code of this project's own.

`kinds` says what processors and types it is for, `..._program` write it, `machine_code` compiles it, `products` and
`attention` call it.
"""
