"""Make folders of shards: `condot prepare imagefolder IMAGES --output SHARDS`."""
