# The web page in a container; docs/install.md has the commands. TORCH_INDEX: where pip takes torch from. The default
# has torch for a CPU only; https://pypi.org/simple has it with CUDA.
FROM python:3.13-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

WORKDIR /app
COPY requirements.txt ./
COPY requirements/app.txt requirements/
RUN grep '^torch' requirements.txt > torch.txt \
 && pip install --no-cache-dir --index-url "$TORCH_INDEX" -r torch.txt \
 && pip install --no-cache-dir -r requirements/app.txt \
 && rm torch.txt

COPY *.py ./
COPY data data/
COPY decoding decoding/
COPY weights weights/
COPY scoring scoring/
COPY training training/
COPY captioning captioning/
COPY publishing publishing/
COPY benchmarks benchmarks/

# Models that are downloaded are kept in /cache, and models of your own are looked for in /models.
ENV XDG_CACHE_HOME=/cache PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 captioner && mkdir /cache /models && chown captioner /cache /models
USER 1000
WORKDIR /models
EXPOSE 7860

# What follows the image's name in `docker run` is added, such as --model distilvit.
ENTRYPOINT ["python", "/app/app.py", "--host", "0.0.0.0", "--port", "7860"]
