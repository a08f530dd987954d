//! The search for a caption: logits in, tokens out. Greedy and beam search as `generate` of transformers 5.24 does them without sampling and
//! with `early_stopping = False`, to its float32 arithmetic; where scores are equal, the earlier beam and then the lower token comes first.

use dnd_onnx::Error;

/// What takes a sequence out of the running. Scores are sums of log-probabilities, far above it.
const OUT: f32 = -1e9;

/// How a caption is searched for; the names and their meaning are those of transformers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Generation {
    /// Tokens that may be generated, the end token counted.
    pub max_new_tokens: u32,
    /// Length below which the caption may not end, the start token counted; a picture that the text goes on from is not.
    pub min_length: u32,
    /// Sequences that are kept at each step; 1 takes the likeliest token each time.
    pub num_beams: u32,
    /// What the score of a token that is there already is divided by (multiplied by, where the score is negative); the start token is there.
    pub repetition_penalty: f32,
    /// The exponent of the length that a finished beam's score is divided by.
    pub length_penalty: f32,
}

/// The method's constants: greedy, 32 new tokens, at least 5 with the start token.
impl Default for Generation {
    fn default() -> Self {
        Self { max_new_tokens: 32, min_length: 5, num_beams: 1, repetition_penalty: 1.0, length_penalty: 1.0 }
    }
}

/// The search for one caption. It runs on rows of a batch of sequences: one at first, then those of [`Search::running`], until there are none.
#[derive(Debug)]
pub(crate) struct Search {
    generation: Generation,
    /// Tokens before the first that is generated.
    start: usize,
    ends: Vec<u32>,
    running: Vec<Beam>,
    /// The best first, `num_beams` at most.
    finished: Vec<Beam>,
}

/// A sequence.
#[derive(Debug, Clone)]
pub(crate) struct Beam {
    /// The row, of those before the last step, that it goes on from.
    pub(crate) row: usize,
    /// The start and what was generated.
    tokens: Vec<u32>,
    score: f32,
}

impl Beam {
    /// The newest token.
    pub(crate) fn last(&self) -> u32 {
        self.tokens.last().copied().unwrap_or_default()
    }

    fn followed_by(&self, row: usize, token: u32, score: f32) -> Self {
        let mut tokens = Vec::with_capacity(self.tokens.len() + 1);
        tokens.extend_from_slice(&self.tokens);
        tokens.push(token);
        Self { row, tokens, score }
    }
}

impl Search {
    /// A search that begins with some tokens, the last of which is the start token, and ends at any of others.
    pub(crate) fn new(generation: Generation, start: &[u32], ends: &[u32]) -> Self {
        let running = vec![Beam { row: 0, tokens: start.to_vec(), score: 0.0 }];
        Self { generation, start: start.len(), ends: ends.to_vec(), running, finished: Vec::new() }
    }

    /// The sequences that go on, the best first; none once the search is over.
    pub(crate) fn running(&self) -> &[Beam] {
        &self.running
    }

    /// Takes the logits after the newest token of each running sequence, and chooses those that go on.
    pub(crate) fn step(&mut self, logits: &[Vec<f32>]) -> Result<(), Error> {
        if logits.iter().flatten().any(|value| value.is_nan()) {
            return Err(Error::Run("the decoder's logits are not numbers (NaN); a float16 model may be out of its range".to_owned()));
        }
        if self.generation.num_beams > 1 {
            self.step_beams(logits)
        } else {
            self.step_greedily(logits)
        }
        Ok(())
    }

    /// The tokens of the best sequence, without start and end.
    pub(crate) fn best(self) -> Vec<u32> {
        let mut tokens = self.finished.into_iter().next().map(|beam| beam.tokens).unwrap_or_default();
        tokens.drain(..self.start.min(tokens.len()));
        if tokens.last().is_some_and(|last| self.ends.contains(last)) {
            tokens.pop();
        }
        tokens
    }

    fn step_greedily(&mut self, logits: &[Vec<f32>]) {
        let (Some(beam), Some(logits)) = (self.running.pop(), logits.first()) else { return };
        let mut scores = logits.clone();
        self.process(&beam.tokens, &mut scores);
        let next = beam.followed_by(0, argmax(&scores), 0.0);
        let over = self.is_over(&next);
        if over { &mut self.finished } else { &mut self.running }.push(next);
    }

    fn step_beams(&mut self, logits: &[Vec<f32>]) {
        let beams = self.generation.num_beams as usize;
        // The tokens of all sequences follow one another; enough are kept for `beams` to go on, should all others end.
        let vocabulary = logits.first().map_or(0, Vec::len);
        let scores: Vec<f32> = (self.running.iter().zip(logits))
            .flat_map(|(beam, logits)| {
                let mut scores = log_softmax(logits);
                self.process(&beam.tokens, &mut scores);
                scores.into_iter().map(|score| score + beam.score)
            })
            .collect();
        let next: Vec<(Beam, bool)> = highest(&scores, (1 + self.ends.len()).max(2) * beams)
            .into_iter()
            .map(|at| {
                let row = at / vocabulary;
                let beam = self.running[row].followed_by(row, (at % vocabulary) as u32, scores[at]);
                let over = self.is_over(&beam);
                (beam, over)
            })
            .collect();

        let generated = next.first().map_or(0, |(beam, _)| beam.tokens.len() - self.start);
        let by_length = f64::from(generated as u32).powf(f64::from(self.generation.length_penalty)) as f32;
        // Of those that end, only the `beams` best of all count.
        let ended = next.iter().take(beams).filter(|(_, over)| *over).map(|(beam, _)| Beam { score: beam.score / by_length, ..beam.clone() });
        self.finished.extend(ended);
        self.finished.sort_by(|a, b| b.score.total_cmp(&a.score));
        self.finished.truncate(beams);

        self.running = next.into_iter().filter(|(_, over)| !over).map(|(beam, _)| beam).take(beams).collect();
        let best = self.running.first().map_or(OUT, |beam| beam.score / by_length);
        let worst = self.finished.get(beams - 1).map_or(OUT, |beam| beam.score);
        if best <= worst {
            self.running.clear();
        }
    }

    fn is_over(&self, beam: &Beam) -> bool {
        beam.tokens.len() - self.start >= self.generation.max_new_tokens as usize || self.ends.contains(&beam.last())
    }

    /// Repetition penalty, then shortest length, as transformers orders them.
    fn process(&self, tokens: &[u32], scores: &mut [f32]) {
        let penalty = self.generation.repetition_penalty;
        if penalty != 1.0 {
            for (at, token) in tokens.iter().enumerate() {
                if !tokens[..at].contains(token)
                    && let Some(score) = scores.get_mut(*token as usize)
                {
                    *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
                }
            }
        }
        if tokens.len() - self.start + 1 < self.generation.min_length as usize {
            for end in &self.ends {
                if let Some(score) = scores.get_mut(*end as usize) {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// The token with the highest score.
fn argmax(scores: &[f32]) -> u32 {
    let mut best = 0;
    for (token, score) in scores.iter().enumerate() {
        if *score > scores[best] {
            best = token;
        }
    }
    best as u32
}

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|value| f64::from(value - highest).exp()).sum();
    let log_sum = sum.ln() as f32;
    logits.iter().map(|value| value - highest - log_sum).collect()
}

/// Where the highest scores are, the highest first.
fn highest(scores: &[f32], count: usize) -> Vec<usize> {
    let order = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
    let mut at: Vec<usize> = (0..scores.len()).collect();
    if count < at.len() {
        at.select_nth_unstable_by(count, order);
        at.truncate(count);
    }
    at.sort_unstable_by(order);
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: u32 = 0;
    const END: u32 = 1;

    /// Runs a search on logits that depend on the sequence so far.
    fn search(generation: Generation, logits: impl Fn(&[u32]) -> Vec<f32>) -> Vec<u32> {
        let mut search = Search::new(generation, &[START], &[END]);
        let mut rows = vec![vec![START]];
        while !rows.is_empty() {
            search.step(&rows.iter().map(|row| logits(row)).collect::<Vec<_>>()).unwrap();
            rows = search.running().iter().map(|beam| [rows[beam.row].as_slice(), &[beam.last()]].concat()).collect();
        }
        search.best()
    }

    fn probabilities(of: [f32; 4]) -> Vec<f32> {
        of.map(f32::ln).to_vec()
    }

    #[test]
    fn beams_find_the_likelier_sequence_whose_first_token_is_not_the_likeliest() {
        // 2 first: 0.5 * 0.4; 3 first: 0.4 * 0.9.
        let logits = |tokens: &[u32]| match tokens {
            [_] => probabilities([1e-9, 0.1, 0.5, 0.4]),
            [_, 2] => probabilities([1e-9, 0.4, 0.3, 0.3]),
            _ => probabilities([1e-9, 0.9, 0.05, 0.05]),
        };
        let generation = Generation { max_new_tokens: 4, min_length: 0, ..Generation::default() };
        assert_eq!(search(generation, logits), [2]);
        assert_eq!(search(Generation { num_beams: 2, ..generation }, logits), [3]);
    }

    #[test]
    fn a_token_that_is_there_is_penalised_once_whatever_its_score() {
        let search = Search::new(Generation { repetition_penalty: 2.0, min_length: 0, ..Generation::default() }, &[START], &[END]);
        let mut scores = [8.0, -8.0, 3.0, -3.0];
        search.process(&[0, 3, 3, 0], &mut scores);
        assert_eq!(scores, [4.0, -8.0, 3.0, -6.0]);
    }

    #[test]
    fn no_end_comes_before_the_shortest_length_and_all_ends_at_the_longest() {
        let ending = |_: &[u32]| probabilities([0.1, 0.6, 0.2, 0.1]);
        for num_beams in [1, 3] {
            let generation = Generation { min_length: 4, num_beams, ..Generation::default() };
            assert_eq!(search(generation, ending).len(), 3, "with the start token, four");
            let endless = Generation { max_new_tokens: 3, min_length: 512, ..generation };
            assert_eq!(search(endless, ending).len(), 3);
        }
    }

    #[test]
    fn logits_that_are_not_numbers_are_an_error() {
        let mut search = Search::new(Generation::default(), &[START], &[END]);
        assert!(search.step(&[vec![0.0, f32::NAN, 0.0]]).unwrap_err().to_string().contains("NaN"));
    }
}
