"""Publish a model: write it as a folder, and upload the folder to the Hugging Face Hub."""
