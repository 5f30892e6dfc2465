"""The lecture's pictures, made by our own code: `python -m pipeline.pictures --output docs/pictures`.

`scenes` has the data in the plane and trains small networks on them, `style` how
things look, `still`, `charts` and `moving` draw, `table` measures rounding; docs/theory.md walks through them.
"""
