"""Tools for agents: the calls of the API once more, in the Model Context Protocol."""
