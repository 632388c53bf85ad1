"""What can go wrong, as types. Every message is one line that says what to do; the command prints it and exits 2."""


class EmilieError(ValueError):
    """Base of all errors that bad input can cause."""


class ConfigError(EmilieError):
    """A config file that does not fit the schema, or settings that no model can have."""


class CheckpointError(EmilieError):
    """A weight file that is missing, broken, unsafe, or not what the config describes."""


class ImageError(EmilieError):
    """A picture that cannot be read or has an unusable size."""


class MaskError(EmilieError):
    """A mask or box that does not fit its picture or selects nothing."""


class InstructionError(EmilieError):
    """An instruction that is empty, too long, or in words that the model does not know."""


class TokenizerError(EmilieError):
    """The tokenizer's files are not on this machine."""


class CanvasError(EmilieError):
    """A canvas file or an edit history that cannot be used as asked."""


class SamplingError(EmilieError):
    """Sampler settings out of range, or a result that is not finite."""


class BenchError(EmilieError):
    """A benchmark folder, a run of one, or a method's name that cannot be used as asked.

    Of a folder with several faults it names each on a line of its own.
    """
