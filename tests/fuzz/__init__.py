"""Fuzzing of everything that reads files: `make fuzz` (with atheris), and a short run without it in test_fuzz.py.

targets.py says what is called and which errors are expected, structure.py takes files apart and spoils their parts,
seeds.py makes the files to begin with, main.py is the process that atheris runs, run.py starts it and counts.
"""
