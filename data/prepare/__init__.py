"""Make folders of shards: `python -m data.prepare imagefolder IMAGES --output SHARDS`."""
