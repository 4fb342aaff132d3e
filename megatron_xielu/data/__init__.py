"""Text in, a data folder out: `train.bin/.idx`, `valid.bin/.idx`, `tokenizer/`, `dataset.json`."""
