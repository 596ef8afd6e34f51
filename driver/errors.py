"""Errors a user of the command line or of `load` can meet: each one sentence that says what is wrong and what to do."""

from __future__ import annotations

from ..ir.errors import TilewrightError


class UserError(TilewrightError):
    """Bad input; the command prints it without a traceback and exits with status 2."""


class ModelNotFound(UserError):
    template = "there is no file {path}; give a .pt2 or TorchScript file, or package.module:callable"


class NotAModel(UserError):
    template = "{path} is not a model: {reason}"


class PickleRefused(UserError):
    template = "{path} holds {what}, which runs code when read; pass --trust-pickle only if you made the file or trust who did"


class BadInputs(UserError):
    template = "cannot use --inputs {spec}: {reason}"


class BadCalibration(BadInputs):
    template = "cannot use --calibration {spec}: {reason}"


class BadOption(UserError):
    template = "{option}: {reason}"


class NoInputs(UserError):
    template = '{path} carries no example inputs; give --inputs "x=1x3x224x224:f32" or a file of tensors'


class ModelFails(UserError):
    template = "{path} fails on these inputs ({inputs}): {reason}"


class CannotWrite(UserError):
    template = "cannot write {path}: {reason}; nothing was left behind"


class BadArtifact(UserError):
    template = "{path} is not a usable tilewright artifact: {reason}"


class WrongMachine(BadArtifact):
    template = "{path} was compiled for {target}, and {reason}"


class CodeNotTrusted(BadArtifact):
    template = (
        "{path} holds code for {target} that you did not compile, and {maker}, which could compile it anew, is not installed; "
        "pass trust_code=True only if you trust who made the file"
    )


class UnknownTarget(UserError):
    template = "there is no target {target!r}; known targets are {known}"


class NoTriton(UserError):
    template = "cannot compile for {target}: {reason}"


class NoTimings(UserError):
    template = "cannot read timings from {path}: {reason}"


class CannotOptimize(UserError):
    template = "cannot optimize {path}: {reason}"


class TooManyActivations(CannotOptimize):
    """No patches of the graph keep the limit on intermediate values."""


def first_line(error: BaseException) -> str:
    """What an exception says in its first line, as the reason of a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
