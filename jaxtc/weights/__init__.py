"""Where arrays come from and go to.

``sources`` finds what a source string means; ``files`` reads and writes safetensors and npz;
``adapters`` are PEFT's, merged while they are read; ``checkpoints`` are orbax's; ``conversion``
goes from one format to another; ``names`` is the one table that ties the parameters of
:class:`jaxtc.Gemma2` to the tensors of its published checkpoints.
"""
