"""Caption pictures: into files, on a web page and for programs."""
