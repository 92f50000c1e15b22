"""Four implementations of one signature: ``bind(args: FillArgs) -> Callable[[], None]``."""
