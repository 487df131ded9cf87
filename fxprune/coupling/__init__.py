"""Which channels stand or fall together.

labels       fields of labels on tensors, and the facts that ops state about them
rules        the registry, and elementwise ops; movement, mixing, contraction: the other families
run          one labelled run of a traced graph
solve        facts -> classes and balanced blocks
groups       classes -> ChannelGroups and consumers
"""
