"""The ground floor: the alphabet of dimensions, `dot`, tree paths, strict configs, user errors."""
