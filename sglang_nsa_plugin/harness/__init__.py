"""SGLang's real attention backend without a server: what demo, bench and the tests drive."""
