"""Endpoints in OpenAI's form for other programs: /v1/chat/completions and /v1/models.

Pictures of all requests are captioned in common batches. A text is the start of the caption ("a photo of"). A text that ends
like a sentence is an instruction; a captioner cannot follow it, so it is ignored.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import time
import uuid
from collections.abc import Iterable
from typing import Any

from captioning.decoder import BusyError
from captioning.service import Captioner, Source, decoding_options
from config import UserError
from utils import in_one_line, named

COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/models"
MOST_CHOICES = 5
MOST_TEXT = 400  # characters of a caption's start


class RequestError(Exception):
    """An error in OpenAI's form: the HTTP status, a code, and the field of the request that is wrong."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(in_one_line(message)[:500])
        self.param, self.status, self.code = param, status, code

    @property
    def content(self) -> dict[str, Any]:
        """The body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Chat:
    """Answer requests to /v1/, and pass all others on to another ASGI application."""

    def __init__(self, app: Any, captioner: Captioner, model: str, most_bytes: int, key: str | None = None) -> None:
        """model: the name that clients use; key: the bearer token that they must send, if any."""
        self.app, self.captioner, self.model = app, captioner, model
        self.most_bytes, self.key, self.began = most_bytes, key, int(time.time())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self.app(scope, receive, send)
        from starlette.requests import Request
        from starlette.responses import JSONResponse, StreamingResponse

        request = Request(scope, receive)
        try:
            self.check_key(request.headers.get("authorization", ""))
            if scope["path"] == MODELS and request.method == "GET":
                answer: Any = {"object": "list", "data": [self.about()]}
            elif scope["path"] == COMPLETIONS and request.method == "POST":
                sent = await request.json()
                answer = await self.complete(sent)
                if sent.get("stream"):
                    usage = isinstance(options := sent.get("stream_options"), dict) and bool(
                        options.get("include_usage")
                    )
                    response = StreamingResponse(pieces(answer, usage), media_type="text/event-stream")
                    return await response(scope, receive, send)
            else:
                raise RequestError(f"{request.method} {scope['path']}: not answered here", status=404)
        except Exception as error:
            refused = refusal(error)
            return await JSONResponse(refused.content, refused.status)(scope, receive, send)
        await JSONResponse(answer)(scope, receive, send)

    def check_key(self, header: str) -> None:
        """Raise RequestError if a key is needed and this one is wrong."""
        if self.key and not hmac.compare_digest(header.encode(), f"Bearer {self.key}".encode()):
            raise RequestError("the API key is missing or wrong", status=401, code="invalid_api_key")

    def about(self) -> dict[str, Any]:
        """The model, as /v1/models lists it."""
        return {"id": self.model, "object": "model", "created": self.began, "owned_by": "vit-gpt2-captioning"}

    async def complete(self, sent: dict[str, Any]) -> dict[str, Any]:
        """Answer a request to /v1/chat/completions."""
        asked = field(sent, "model", str, self.model)
        if asked != self.model:
            message = f"no model {asked!r} here, only {self.model!r}"
            raise RequestError(message, "model", 404, "model_not_found")
        url, caption_start = picture_and_text(sent.get("messages"))
        options, longest = self.options(sent, caption_start)
        submitted = await asyncio.to_thread(self.submit, url, options)
        captions = await asyncio.wrap_future(submitted)
        lengths = [self.tokens(caption.text) for caption in captions]
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": caption.text, "refusal": None},
                "finish_reason": "length" if length >= longest else "stop",
                "logprobs": None,
            }
            for i, (caption, length) in enumerate(zip(captions, lengths, strict=True))
        ]
        model = self.captioner.model
        read = self.tokens(caption_start) + (model.config.num_patches if model else 0)
        usage = {"prompt_tokens": read, "completion_tokens": sum(lengths), "total_tokens": read + sum(lengths)}
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time())}
        return about | {"model": self.model, "choices": choices, "usage": usage}

    def options(self, sent: dict[str, Any], caption_start: str) -> tuple[dict[str, Any], int]:
        """Options for Captioner.submit, and the longest caption in tokens. Captions are sampled if the temperature is above
        0; by default, and at 0, beam search finds them."""
        number = field(sent, "n", int, 1)
        if not 1 <= number <= MOST_CHOICES:
            raise RequestError(f"n is {number}: ask for 1 to {MOST_CHOICES}", "n")
        temperature, top_p = (field(sent, name, float, None) for name in ("temperature", "top_p"))
        if temperature is not None and not 0 <= temperature <= 2:
            raise RequestError(f"temperature is {temperature:g}: it must be 0 to 2", "temperature")
        if top_p is not None and not 0 < top_p <= 1:
            raise RequestError(f"top_p is {top_p:g}: it must be above 0 and at most 1", "top_p")
        options = decoding_options("normal", "varied" if temperature else "safe", number)
        if temperature:
            options |= {"temperature": temperature, "top_p": 1.0 if top_p is None else top_p}
        model = self.captioner.model
        if model is None:
            raise RequestError("there is no model here yet: python main.py --preset demo trains one", status=503)
        room = model.config.text_positions - self.tokens(caption_start)
        longest = field(sent, "max_completion_tokens", int, None) or field(sent, "max_tokens", int, None) or 32
        if longest < 1:
            raise RequestError(f"max_tokens is {longest}: it must be at least 1", "max_tokens")
        options["max_length"] = max(1, min(longest, room))
        return options | ({"prefix": caption_start} if caption_start else {}), options["max_length"]

    def submit(self, url: str, options: dict[str, Any]) -> Any:
        """Read the picture at a URL and submit it. Runs in a thread, because it may have to be fetched."""
        content = (
            embedded(url, self.most_bytes) if url.startswith("data:") else Source(url, url=url).read(self.most_bytes)
        )
        return self.captioner.submit(content, "the picture" if url.startswith("data:") else url, options)

    def tokens(self, text: str) -> int:
        """Number of tokens of a text."""
        model = self.captioner.model
        return len(model.tokenizer(text, add_special_tokens=False)["input_ids"]) if model and text else 0


def field(sent: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """A field of a request; the default if it is missing or null. Raises RequestError if it has another type."""
    value = sent.get(name)
    if value is None:
        return default
    fits = isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)
    if not fits or value != value:
        raise RequestError(f"{name} has to be {'a number' if kind is float else f'of type {kind.__name__}'}", name)
    return value


def picture_and_text(messages: Any) -> tuple[str, str]:
    """The URL of the one picture in a conversation, and the caption's start. Raises RequestError for anything else."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RequestError("messages has to be a list of messages", "messages")
    pictures: list[str] = []
    text = ""
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            value = part.get(kind) if kind in ("text", "image_url") else None
            if kind == "image_url":
                value = value.get("url") if isinstance(value, dict) else value
            if not isinstance(value, str) and not (kind == "text" and value is None):
                raise RequestError("a message has parts of type text or image_url", "messages")
            if kind == "image_url":
                pictures.append(str(value))
            elif message.get("role") != "system" and value and value.strip():
                text = value.strip()
    if len(pictures) != 1:
        raise RequestError(f"{len(pictures)} pictures: send one image_url in each request", "messages")
    instruction = text[-1:] in ".?!:。？！：" or "\n" in text
    if not instruction and len(text) > MOST_TEXT:
        raise RequestError(f"a text of {len(text)} characters: a caption's start has at most {MOST_TEXT}", "messages")
    return pictures[0], "" if instruction else text


def embedded(url: str, most_bytes: int) -> bytes:
    """The content of a data: URL. Raises RequestError if it is not base64, or too large."""
    head, _, content = url.partition(",")
    if not head.endswith(";base64"):
        raise RequestError("a data: URL has to be base64", "messages")
    if len(content) > most_bytes * 4 / 3 + 4:
        raise RequestError(f"the picture is larger than {most_bytes >> 20} MiB", "messages", 413)
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("the data: URL is not base64", "messages") from None


def pieces(answer: dict[str, Any], usage: bool) -> Iterable[str]:
    """Yield a completion as server-sent events, each caption in one piece."""
    about = {name: answer[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    for choice in answer["choices"]:
        delta = {"role": "assistant", "content": choice["message"]["content"]}
        for part, reason in ((delta, None), ({}, choice["finish_reason"])):
            choices = [{"index": choice["index"], "delta": part, "finish_reason": reason}]
            yield f"data: {json.dumps(about | {'choices': choices})}\n\n"
    if usage:
        yield f"data: {json.dumps(about | {'choices': [], 'usage': answer['usage']})}\n\n"
    yield "data: [DONE]\n\n"


def refusal(error: Exception) -> RequestError:
    """Convert any error to the request's answer."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, BusyError):
        return RequestError(str(error), status=503)
    if isinstance(error, UserError | ValueError):
        return RequestError(str(error), "messages")
    return RequestError(f"cannot be answered ({named(error)})", status=500)
