"""The errors that input can cause. Anything else that is raised is a bug of ours and keeps its traceback."""


class MinistralError(Exception):
    """A foreseen failure. Its message is one line: what was found, what was expected, what to do."""


class ConfigError(MinistralError):
    """A configuration file or value that does not describe a model we can build."""


class CheckpointError(MinistralError):
    """A weight file that is missing, damaged, or does not match its configuration."""


class TokenizerError(MinistralError):
    """A tokenizer file that is missing or damaged, or a conversation it cannot render."""


class RequestError(MinistralError):
    """A generation or scoring request that cannot be served, refused before any work is done."""


class ShardingError(MinistralError):
    """A mesh or a layout that does not fit the model or the devices that are there."""


class HostsError(MinistralError):
    """Processes on several hosts that do not come together, differ, or lose one of them."""
