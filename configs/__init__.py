"""Starting points, a commented YAML file each; their schema is `flux2_relay.pipeline.config.Config`."""
