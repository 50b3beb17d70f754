"""Captioning: names of pictures become captions, in files, on a web page and for programs."""
