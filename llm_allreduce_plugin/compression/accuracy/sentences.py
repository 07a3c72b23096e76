"""Sentences in groups of like meaning, so that who is nearest to whom says something."""

SENTENCES = (
    # cooking
    "Simmer the tomato sauce for twenty minutes and stir it now and then.",
    "Knead the dough until it is smooth, then let it rise under a cloth.",
    "A pinch of salt brings out the taste of dark chocolate.",
    "The soup was too thin, so she added a few boiled potatoes.",
    "Fry the onions slowly; burnt onions make the whole stew bitter.",
    "He forgot the yeast and the bread came out flat as a tile.",
    # weather
    "Heavy rain is expected along the coast until Thursday morning.",
    "A thick fog covered the valley and hid the church tower.",
    "The first frost of the year came early and killed the tomatoes.",
    "Strong winds tore several roofs off the houses by the harbour.",
    "After a month without rain the river had almost run dry.",
    "Thunder rolled over the hills long before the storm arrived.",
    # money
    "The central bank raised its interest rate by a quarter of a point.",
    "Shares of the carmaker fell after it announced weak sales.",
    "She moved her savings into a fund that follows the whole market.",
    "The company paid back its loan two years earlier than agreed.",
    "Prices of bread and milk rose faster than wages last year.",
    "The auditors found that two invoices had been paid twice.",
    # medicine
    "The nurse measured his blood pressure twice and wrote it down.",
    "A broken wrist usually heals within six to eight weeks.",
    "The vaccine protects most children against a severe illness.",
    "He takes one tablet in the morning and another before bed.",
    "The surgeon explained the risks of the operation to the family.",
    "Washing your hands often keeps many infections away.",
    # computing
    "The program crashes when the input file is empty.",
    "Two threads write to the same counter without holding the lock.",
    "The graphics card copies its results back to main memory.",
    "A faster network helps little if the disks cannot keep up.",
    "The compiler warns about a variable that is never used.",
    "We store a checksum with every block to notice damaged data.",
    # travel
    "The night train to the mountains leaves from platform seven.",
    "Our flight was delayed, so we missed the last ferry to the island.",
    "The hotel kept our bags until the evening without charging us.",
    "From the pass you can see three lakes and a glacier.",
    "He lost his passport on the second day of the journey.",
    "The bus drives along the cliffs and stops at every small beach.",
    # music
    "The violinist tuned her instrument while the hall filled up.",
    "The choir practised the final chorus again and again.",
    "He hums the same tune every morning without noticing it.",
    "The drummer counted in and the whole band began to play.",
    "An old piano needs tuning more often than a new one.",
    "The singer lost her voice two hours before the concert.",
    # sport
    "The goalkeeper stopped two penalties in the last ten minutes.",
    "She ran the final lap faster than any lap before it.",
    "The climbers waited in the hut until the wind died down.",
    "Our team lost the match although it led until half-time.",
    "The cyclist broke away from the group on the steepest part.",
    "The referee looked at the replay and took the goal back.",
)
