"""A Triton backend named cpu, so that vLLM's V2 model runner starts on a machine without a GPU.

It compiles nothing: with TRITON_INTERPRET=1 Triton runs its kernels as Python, slowly, and only asks which
backends there are. This folder is put on the path of the process under test (not installed); Triton finds the
backend through the entry point in the dist-info folder beside it.
"""
