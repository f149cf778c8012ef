"""The INQ paper's tables in small, in one command: ``make tables``, or ``python -m examples.tables`` at the root.

- ``networks``: five small networks on handwritten digits, of the kinds that the paper has;
- ``tasks``: how they are trained and measured; ``language``: the byte-level language model instead;
- ``methods``: what each row of a table does, from the same float32 start, with the same number of further steps;
- ``jobs``: one method on one network and seed, each saved as it is done, so that a stopped run goes on;
- ``intervals``: means over the seeds and paired differences, with their 95 % t-intervals;
- ``paper``: the paper's own numbers; ``tables``: one function for each table; ``page``: all of it as Markdown.

docs/comparisons.md says what is compared with what.
"""
