"""Language models as GGUF files: opened, and written tensor by tensor."""
