"""Words by what they name: one of the quality benchmark's families is made of them. Written for it, by hand."""

from __future__ import annotations

CATEGORIES = {
    "animal": "dog cat horse cow sheep goat pig lion tiger bear wolf fox deer rabbit squirrel mouse rat elephant "
    "giraffe zebra monkey gorilla camel kangaroo koala panda leopard cheetah donkey otter beaver moose "
    "bison hamster badger",
    "bird": "eagle hawk falcon owl crow raven sparrow robin pigeon dove swan goose duck chicken turkey peacock "
    "parrot penguin ostrich flamingo pelican seagull stork heron woodpecker hummingbird canary magpie "
    "vulture albatross",
    "fish": "salmon tuna trout cod herring sardine mackerel shark carp eel halibut haddock anchovy bass catfish "
    "swordfish piranha pike perch flounder sturgeon barracuda goldfish stingray snapper",
    "insect": "ant bee wasp fly mosquito butterfly moth beetle ladybug grasshopper cricket dragonfly cockroach "
    "termite flea hornet locust cicada mantis firefly aphid bumblebee earwig gnat",
    "fruit": "apple banana orange grape lemon lime peach pear plum cherry strawberry raspberry blueberry "
    "blackberry mango pineapple watermelon melon kiwi apricot fig papaya coconut pomegranate grapefruit "
    "tangerine cranberry guava lychee",
    "vegetable": "carrot potato onion cabbage broccoli cauliflower spinach lettuce celery asparagus radish turnip beet "
    "leek zucchini eggplant artichoke kale cucumber garlic parsnip pumpkin squash yam",
    "color": "red blue green yellow purple pink brown black white gray violet crimson turquoise scarlet maroon "
    "beige magenta indigo cyan navy lavender teal",
    "clothing": "shirt trousers jacket coat sweater skirt dress socks gloves scarf hat jeans shorts blouse vest "
    "pajamas underwear hoodie tuxedo cardigan raincoat mittens apron stockings",
    "furniture": "chair table sofa couch desk bed wardrobe bookcase stool bench cupboard dresser armchair cabinet "
    "nightstand ottoman recliner bookshelf crib sideboard",
    "tool": "hammer screwdriver saw wrench pliers drill chisel axe shovel rake hoe crowbar spade sandpaper mallet "
    "hacksaw pickaxe trowel clamp spanner",
    "instrument": "piano guitar violin flute trumpet drum cello clarinet saxophone harp trombone oboe banjo tuba "
    "accordion harmonica xylophone ukulele mandolin viola bassoon tambourine",
    "sport": "football soccer basketball baseball tennis golf hockey volleyball rugby swimming boxing cricket "
    "wrestling skiing badminton cycling gymnastics rowing fencing surfing archery judo karate handball "
    "squash snowboarding",
    "job": "teacher doctor nurse lawyer engineer plumber electrician carpenter farmer baker butcher chef waiter "
    "pilot firefighter dentist accountant architect journalist mechanic barber librarian scientist tailor "
    "surgeon secretary hairdresser cashier photographer translator",
    "vehicle": "car truck bus motorcycle bicycle train airplane helicopter boat ship van taxi tram scooter tractor "
    "ambulance submarine yacht ferry canoe limousine minivan jeep trolley",
    "country": "France Germany Spain Italy Portugal Poland Sweden Norway Finland Denmark Greece Turkey Egypt Nigeria "
    "Kenya India China Japan Thailand Vietnam Indonesia Brazil Argentina Chile Peru Mexico Canada "
    "Australia Ireland Austria Switzerland Belgium Hungary Romania Ukraine Morocco",
    "city": "Paris London Berlin Madrid Rome Vienna Tokyo Beijing Moscow Chicago Boston Seattle Toronto Sydney "
    "Melbourne Mumbai Delhi Cairo Lagos Istanbul Barcelona Munich Milan Amsterdam Dublin Oslo Stockholm "
    "Helsinki Prague Warsaw Budapest Athens Lisbon Bangkok Shanghai",
    "body part": "hand foot leg arm head nose ear eye mouth knee elbow shoulder finger toe neck ankle wrist chin "
    "forehead chest thumb hip heel tongue cheek",
    "metal": "iron gold silver copper aluminum zinc lead nickel platinum titanium tin mercury chromium tungsten "
    "cobalt magnesium steel brass bronze",
    "drink": "water milk coffee tea juice beer wine whiskey vodka lemonade soda champagne cider rum cocoa gin "
    "tequila brandy espresso cappuccino",
    "flower": "rose tulip daisy lily sunflower orchid daffodil carnation marigold iris violet poppy dandelion "
    "hyacinth chrysanthemum petunia peony begonia geranium magnolia",
    "tree": "oak pine maple birch willow cedar elm spruce fir ash poplar beech cypress redwood sycamore sequoia",
    "relative": "mother father sister brother uncle aunt cousin nephew niece grandmother grandfather son daughter "
    "husband wife grandson",
}
# What else is right: `Q: What kind of thing is an eagle?` is answered by "animal", too.
ALSO = {
    "bird": ("animal",),
    "fish": ("animal",),
    "insect": ("animal", "bug"),
    "color": ("colour",),
    "clothing": ("clothes", "garment", "piece of clothing"),
    "instrument": ("musical instrument",),
    "job": ("profession", "occupation"),
    "vehicle": ("transport", "mode of transportation"),
    "flower": ("plant",),
    "tree": ("plant",),
    "relative": ("family member", "family", "person"),
    "drink": ("beverage",),
    "animal": ("mammal",),
    "fruit": ("food",),
    "vegetable": ("food",),
}
