"""Faults injected into system calls, by count and not by chance: `make faults`, and short versions in test_faults.py.

shim.cpp stands between a process and libc, shim.py builds it and speaks to it, saves.py lets every call of every save
fail or be the last one, lives.py trains through hundreds of kills.
"""
