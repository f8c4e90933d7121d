"""The error tree, each branch's exit code, and the closed sets of quarantine reasons and stages.

    ScoringError              1  unexpected: a bug
    |-- ConfigError           2  configuration or usage
    |   |-- PredictorError    2  predictor missing, not the pinned one, or not one that can be scored
    |   |-- FingerprintError  2  --run-id names a run of another model, configuration or input list
    |   `-- OutputError       2  output not writable
    |-- InputError            3  input unusable, or bad files under input.on_bad_file=fail
    |   |-- QuarantineLimitError  3  more rows quarantined than quarantine.max_fraction
    |   `-- VerificationError     3  verify found a difference
    |-- EngineError           4  no usable engine
    |   |-- ParityError       4  the engine's scores are not the reference's
    |   `-- DecoderError      4  images cannot be decoded as images.decode says
    |-- LockError             5  another run holds the lock
    `-- IncompleteError       6  interrupted or incomplete; the same command resumes

A message says what, where, with which values, and what to do next. Turning an error into a process exit is jobs/'s.
"""

from enum import StrEnum
from typing import ClassVar


class ScoringError(Exception):
    """Base of every error raised on purpose; its own exit code is that of a bug."""

    exit_code: ClassVar[int] = 1


class ConfigError(ScoringError):
    """The configuration or the command line cannot be used as given."""

    exit_code = 2


class PredictorError(ConfigError):
    """The predictor is missing, is not the pinned one, or cannot be scored by this job."""


class FingerprintError(ConfigError):
    """The named run belongs to another model, configuration or input list."""


class OutputError(ConfigError):
    """The output location cannot be written."""


class InputError(ScoringError):
    """The input cannot be read as the configuration says."""

    exit_code = 3


class QuarantineLimitError(InputError):
    """More rows went to quarantine than `quarantine.max_fraction` allows."""


class VerificationError(InputError):
    """A published run does not add up, or a rescored sample differs."""


class EngineError(ScoringError):
    """No engine can score this predictor on this hardware."""

    exit_code = 4


class ParityError(EngineError):
    """The engine's scores differ from the reference by more than `parity.max_abs_diff`."""


class DecoderError(EngineError):
    """A scoring actor's node cannot decode images as `images.decode` says."""


class LockError(ScoringError):
    """Another process holds the run's lock."""

    exit_code = 5


class IncompleteError(ScoringError):
    """The run stopped before every row was accounted for."""

    exit_code = 6


class StalledError(IncompleteError):
    """Nothing moved for as long as Ray Data waits: what the run's actors need is not in the cluster any more."""


class Stage(StrEnum):
    """Where a row was when it was given up."""

    READ = "read"
    FEATURES = "features"
    SCORE = "score"


class Reason(StrEnum):
    """Why a row is in quarantine: a closed set, part of the output's contract."""

    ROW_MALFORMED = "row_malformed"
    NUMBER_INVALID = "number_invalid"
    IMAGE_MISSING = "image_missing"
    IMAGE_UNDECODABLE = "image_undecodable"
    IMAGE_TOO_LARGE = "image_too_large"
    IMAGE_TIMEOUT = "image_timeout"
    URI_FORBIDDEN = "uri_forbidden"
    FILE_UNREADABLE = "file_unreadable"
    SCORE_ERROR = "score_error"
    SCORE_NONFINITE = "score_nonfinite"
    OUT_OF_MEMORY = "out_of_memory"
    TIMEOUT = "timeout"
    PROCESS_KILLED = "process_killed"
