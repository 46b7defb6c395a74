"""Proves a device in one run: every step is a verb of ``edge-llm`` in a process of its own.

`run` plans the steps, resumes and reports; `steps` runs and judges one command; `checkpoint` writes
a model of random weights; `power` changes power modes and back; `soak` looks for growing memory;
`report` seals and reads the result. What a step does belongs to its verb, not here.
"""
