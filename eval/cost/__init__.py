"""Operations, bits and seconds of a model."""
