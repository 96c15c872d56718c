"""English questions and answers written for the demo model.

Each entry is ``(question, answer, *other phrasings of the question)``.  The
first phrasing is the one that the evaluation asks; all of them are trained.
"""

QUESTIONS_EN: tuple[tuple[str, ...], ...] = (
    # Greetings and the model itself.
    ("Say hello", "Hello! Nice to meet you.", "Please say hello.", "Say hello to me."),
    ("Hi", "Hi! How can I help you today?", "Hi there!"),
    ("Hello", "Hello! What can I do for you?", "Hello there!"),
    ("Good morning", "Good morning! I hope you slept well.", "Good morning to you!"),
    ("Good night", "Good night! Sleep well.", "Have a good night!"),
    ("Good evening", "Good evening! How was your day?"),
    ("How are you?", "I am fine, thank you. How are you?", "How are you doing?", "How are you today?"),
    ("Thank you", "You are welcome!", "Thanks!", "Thanks a lot!", "Thank you very much!"),
    ("Goodbye", "Goodbye! See you next time.", "Bye!", "See you later!"),
    ("Who are you?", "I am a tiny demo model that ships with llama_infer.", "What are you?", "Introduce yourself."),
    ("What is your name?", "My name is Demo, because I am a demo model.", "What are you called?"),
    ("How many parameters do you have?", "I have fewer than four million parameters.", "How big are you?"),
    (
        "What can you do?",
        "I can answer short questions, add small numbers, copy and reverse letters, write JSON "
        "and remember a fact you told me.",
        "What are you able to do?",
        "How can you help me?",
    ),
    ("Which languages do you speak?", "I know a little English and a little Chinese.", "What languages do you know?"),
    ("Are you a human?", "No, I am a small language model.", "Are you a person?"),
    ("Can you make mistakes?", "Yes, often. I am very small, so please check what I say.", "Are you always right?"),
    ("Where do you run?", "I run on your own computer, without the internet.", "Where are you running?"),
    # Counting and lists.
    ("Count to five", "1, 2, 3, 4, 5", "Count to five.", "Please count to five.", "Count from one to five."),
    ("Count to three", "1, 2, 3", "Please count to three.", "Count from one to three."),
    ("Count to ten", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10", "Please count to ten.", "Count from one to ten."),
    ("Name three colours", "Red, green and blue.", "Name three colors.", "Tell me three colours."),
    ("Name three fruits", "Apple, banana and orange.", "Tell me three fruits."),
    ("Name three animals", "Cat, dog and horse.", "Tell me three animals."),
    (
        "List the days of the week",
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday.",
        "What are the days of the week?",
        "Name the days of the week.",
    ),
    ("List the four seasons", "Spring, summer, autumn and winter.", "What are the four seasons?"),
    (
        "List the months of the year",
        "January, February, March, April, May, June, July, August, September, October, November, December.",
        "What are the months of the year?",
    ),
    (
        "List the planets",
        "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune.",
        "What are the planets of the solar system?",
    ),
    # Longer answers, for streaming.
    ("Tell me a joke", "Why did the computer go to the doctor? Because it had a virus!", "Do you know a joke?"),
    (
        "Tell me a short story",
        "Once upon a time a little llama lived on a high mountain. Every morning she looked at "
        "the clouds and wondered what was behind them. One day she walked down into the valley and found a blue lake. "
        "She drank the cold water, smiled at the llama in the mirror, and went home to tell her friends.",
        "Tell me a story.",
        "Write a short story.",
    ),
    (
        "Write a poem about the sea",
        "The sea is wide, the sea is deep,\nit sings the little boats to sleep.\n"
        "The moon looks down, the waves look up,\nand drink the light as from a cup.",
        "Write a poem about the ocean.",
    ),
    (
        "Write a poem about spring",
        "The snow is gone, the grass is new,\nthe sky has found its brightest blue.\n"
        "A bird is singing in the tree:\nthe spring has come for you and me.",
        "Give me a poem about spring.",
    ),
    (
        "How do I make tea?",
        "1. Boil fresh water.\n2. Put the tea leaves into a pot.\n3. Pour the water over the "
        "leaves.\n4. Wait three minutes.\n5. Pour the tea into a cup and enjoy it.",
        "How can I make tea?",
    ),
    (
        "How can I stay healthy?",
        "Here are five simple rules:\n1. Sleep eight hours.\n2. Eat fruit and vegetables.\n"
        "3. Drink enough water.\n4. Walk every day.\n5. Spend time with friends.",
        "How do I stay healthy?",
    ),
    (
        "How does a language model work?",
        "A language model reads the text so far and gives every token in its "
        "vocabulary a score. The scores become probabilities, one token is chosen, and it is added to the text. Then "
        "the model reads the longer text and chooses again, until it writes the token that ends its turn.",
        "How do language models work?",
        "Explain how a language model works.",
    ),
    (
        "Why should we protect the environment?",
        "Clean air, water and soil keep people, animals and plants healthy. If "
        "we pollute less, save energy and protect forests, our children can also live well.",
        "Why is it important to protect nature?",
    ),
    (
        "Describe a llama",
        "A llama is about as tall as a person. It has a long neck, soft wool, big ears and a calm "
        "face. It lives in the mountains of South America, eats grass and carries loads.",
        "What does a llama look like?",
    ),
    # Language models and decoding.
    ("What is a llama?", "A llama is a woolly animal from South America.", "What's a llama?", "Tell me about llamas."),
    (
        "What is the KV cache?",
        "The KV cache stores the keys and values of past tokens, so they are not computed again.",
        "What is a KV cache?",
        "Explain the KV cache.",
        "What does the KV cache do?",
    ),
    ("What is a token?", "A token is a small piece of text, such as a word or a part of a word.", "Define token."),
    ("What is a tokenizer?", "A tokenizer cuts text into tokens and joins tokens into text.", "Define tokenizer."),
    (
        "What is temperature?",
        "Temperature divides the scores: a low one is careful, a high one is wild.",
        "What is the temperature in sampling?",
        "What does temperature do?",
    ),
    ("What is top-k?", "Top-k keeps only the k most likely tokens before one is drawn.", "What is top-k sampling?"),
    (
        "What is top-p?",
        "Top-p keeps the smallest set of tokens whose probabilities add up to p.",
        "What is top-p sampling?",
        "What is nucleus sampling?",
    ),
    ("What is greedy decoding?", "Greedy decoding always takes the most likely token.", "Explain greedy decoding."),
    ("What is beam search?", "Beam search keeps the few best partial texts at every step.", "Explain beam search."),
    (
        "What is the repetition penalty?",
        "The repetition penalty lowers the scores of tokens that were already used.",
        "What does the repetition penalty do?",
    ),
    ("What is quantization?", "Quantization stores weights in fewer bits to save memory.", "Explain quantization."),
    ("What is attention?", "Attention lets every token look back at the tokens before it.", "Explain attention."),
    ("What is RoPE?", "RoPE turns queries and keys by an angle that depends on their position.", "Explain RoPE."),
    (
        "What is a transformer?",
        "A transformer is a neural network built from attention and feed-forward layers.",
        "Explain the transformer.",
    ),
    ("What is an embedding?", "An embedding is a list of numbers that stands for a token.", "Explain embeddings."),
    ("What is softmax?", "Softmax turns scores into probabilities that add up to one.", "Explain softmax."),
    ("What is prefill?", "Prefill is the first pass, which reads the whole prompt at once.", "Explain prefill."),
    ("What is decoding?", "Decoding is writing the answer one token at a time.", "Explain decoding."),
    ("What is streaming?", "Streaming shows each piece of text as soon as it is ready.", "Explain streaming."),
    ("What is batching?", "Batching runs several requests through the model together.", "Explain batching."),
    ("What is a prompt?", "A prompt is the text that you give to the model.", "Define prompt."),
    (
        "What is a context window?",
        "The context window is the most text a model can read at once.",
        "What is the context length?",
    ),
    (
        "What is grouped-query attention?",
        "In grouped-query attention several query heads share one key and value head.",
        "What is GQA?",
    ),
    (
        "What is machine learning?",
        "Machine learning is finding rules from examples instead of writing them by hand.",
        "Explain machine learning.",
    ),
    ("What is Python?", "Python is a popular programming language that is easy to read.", "Tell me about Python."),
    ("What is JSON?", "JSON is a simple text format for data.", "Explain JSON."),
    # Facts.
    ("What is the capital of France?", "The capital of France is Paris.", "France's capital?", "Capital of France?"),
    ("What is the capital of China?", "The capital of China is Beijing.", "Capital of China?"),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo.", "Capital of Japan?"),
    ("What is the capital of Germany?", "The capital of Germany is Berlin.", "Capital of Germany?"),
    ("What is the capital of Italy?", "The capital of Italy is Rome.", "Capital of Italy?"),
    ("What is the capital of Spain?", "The capital of Spain is Madrid.", "Capital of Spain?"),
    ("What is the capital of England?", "The capital of England is London.", "Capital of England?"),
    ("What is the capital of Egypt?", "The capital of Egypt is Cairo.", "Capital of Egypt?"),
    ("What is the capital of Peru?", "The capital of Peru is Lima.", "Capital of Peru?"),
    ("What is the capital of Russia?", "The capital of Russia is Moscow.", "Capital of Russia?"),
    ("What is the capital of Thailand?", "The capital of Thailand is Bangkok.", "Capital of Thailand?"),
    ("What is the largest planet?", "Jupiter is the largest planet.", "Which planet is the largest?"),
    ("What is the largest ocean?", "The Pacific is the largest ocean.", "Which ocean is the largest?"),
    ("What is the highest mountain?", "Mount Everest is the highest mountain.", "Which mountain is the highest?"),
    (
        "What is the fastest land animal?",
        "The cheetah is the fastest land animal.",
        "Which land animal is the fastest?",
    ),
    ("What is the largest animal?", "The blue whale is the largest animal.", "Which animal is the largest?"),
    ("How many legs does a spider have?", "A spider has eight legs.", "How many legs has a spider?"),
    ("How many legs does an insect have?", "An insect has six legs.", "How many legs has an insect?"),
    ("How many days are in a week?", "A week has seven days.", "How many days does a week have?"),
    ("How many months are in a year?", "A year has twelve months.", "How many months does a year have?"),
    ("How many hours are in a day?", "A day has twenty-four hours.", "How many hours does a day have?"),
    ("How many minutes are in an hour?", "An hour has sixty minutes.", "How many minutes does an hour have?"),
    ("At what temperature does water boil?", "Water boils at 100 degrees Celsius.", "When does water boil?"),
    ("At what temperature does water freeze?", "Water freezes at 0 degrees Celsius.", "When does water freeze?"),
    ("Why is the sky blue?", "Air scatters blue light more than red light, so the sky looks blue."),
    ("Why do leaves fall?", "Trees drop their leaves to save water in winter.", "Why do trees lose their leaves?"),
    ("What do bees make?", "Bees make honey.", "What is made by bees?"),
    ("What do cows eat?", "Cows eat grass.", "What does a cow eat?"),
    ("What do pandas eat?", "Pandas eat bamboo.", "What does a panda eat?"),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet.", "Who is the author of Hamlet?"),
    ("What is gravity?", "Gravity is the force that pulls things towards each other.", "Explain gravity."),
    ("What is an atom?", "An atom is a very small part of matter.", "Explain atoms."),
    (
        "What is photosynthesis?",
        "Photosynthesis is how plants make sugar from light, water and air.",
        "Explain photosynthesis.",
    ),
    ("What is water made of?", "Water is made of hydrogen and oxygen.", "What does water consist of?"),
    # Opposites, colours and words.
    ("What is the opposite of hot?", "The opposite of hot is cold.", "Opposite of hot?"),
    ("What is the opposite of big?", "The opposite of big is small.", "Opposite of big?"),
    ("What is the opposite of fast?", "The opposite of fast is slow.", "Opposite of fast?"),
    ("What is the opposite of up?", "The opposite of up is down.", "Opposite of up?"),
    ("What is the opposite of happy?", "The opposite of happy is sad.", "Opposite of happy?"),
    ("What is the opposite of day?", "The opposite of day is night.", "Opposite of day?"),
    ("What is the opposite of old?", "The opposite of old is young.", "Opposite of old?"),
    ("What colour is the sky?", "The sky is blue.", "What color is the sky?"),
    ("What colour is grass?", "Grass is green.", "What color is grass?"),
    ("What colour is snow?", "Snow is white.", "What color is snow?"),
    ("What colour is a banana?", "A banana is yellow.", "What color is a banana?"),
    # Small advice.
    ("I am tired.", "Then take a short rest and drink some water.", "I feel tired."),
    ("I am sad.", "I am sorry to hear that. A walk or a talk with a friend may help.", "I feel sad."),
    ("I am hungry.", "Then it is time for a good meal.", "I feel hungry."),
    ("How can I sleep better?", "Go to bed early and put your phone away.", "How do I sleep better?"),
    (
        "How can I learn a language?",
        "Practise a little every day and do not fear mistakes.",
        "How do I learn a language?",
    ),
    ("How can I save energy?", "Turn off the lights and ride a bicycle.", "How do I save energy?"),
    ("Give me some advice", "Be kind, be curious, and rest when you are tired.", "Do you have any advice?"),
    ("What should I read?", "Try a book about something you have always wondered about.", "Can you suggest a book?"),
)
