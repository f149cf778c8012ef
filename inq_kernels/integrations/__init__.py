"""Where packed models meet other libraries: ``transformers``, ``peft``, ``vllm``. Each is imported by name, and alone
imports the library that it is for; ``import inq_kernels`` imports none of them."""
