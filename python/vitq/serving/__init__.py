"""From a checkpoint to a service: an engine in process, a server around it, deployment on Ray."""
