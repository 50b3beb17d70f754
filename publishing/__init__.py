"""Publishing: a model becomes a folder, and the folder a repository of the Hugging Face Hub."""
