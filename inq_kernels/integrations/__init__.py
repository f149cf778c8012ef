"""What other libraries need of this one. Nothing here is imported by ``import inq_kernels``."""
