"""Opens checkpoints as they are found: directories, hubs, GGUF, adapters, vocabularies.

`opening` picks the module by what a source looks like; every one of them is a
`checkpoint.Checkpoint`, which reads a tensor at a time. `quantization_config` and
`quantized_module` understand other tools' integers. Text from a checkpoint is a stranger's: it is
checked here, and nothing of it is executed.
"""
