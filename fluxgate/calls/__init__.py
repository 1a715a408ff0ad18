"""Everything that can be asked of a gateway, by noun, as steps (see `asking`)."""
