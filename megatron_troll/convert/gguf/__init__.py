"""A Hugging Face folder from a GGUF file, the format of llama.cpp: config, tokenizer and weights."""
