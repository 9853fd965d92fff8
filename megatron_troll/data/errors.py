class DataError(ValueError):
    """Data or a tokenizer cannot be used; the message names the file, the line or row, and what to do."""


class Malformed(ValueError):
    """Why one record cannot be read. The reader adds the place, and raises or counts it."""
