//! Keyed draws: noise (step 3), shuffles and sampling (step 2B), and what raters are shown (A.1.5).
//!
//! The paper draws and does not say how. Here a draw depends on what it is for and on nothing else, so that image `i` of a concept is
//! the same whichever process, batch or order made it:
//!
//! - A [`Key`] is the first 8 bytes, read as two little-endian `u32`, of the SHA-256 of the parts that name the draw. Each part is
//!   preceded by its length in bytes as a little-endian `u64`. Texts are UTF-8; numbers are little-endian `u64`, whatever their type.
//! - Its words are the outputs of [Philox4x32-10](philox4x32_10) for the counters (0, 0, 0, 0), (1, 0, 0, 0), ..., four words each.
//! - A word `w` stands for the number `(w + 0.5) / 2³²`, which is never 0 or 1.
//!
//! Real arithmetic is in `f64`. (The authors take from one generator for a whole job, so that a unit's images depend on all units before
//! it, and shuffle without a seed.)

use sha2::{Digest as _, Sha256};

/// Names a draw.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key(pub [u32; 2]);

impl Key {
    /// The key of the draw that these parts name.
    pub fn new(parts: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let d = hash.finalize();
        Self([u32::from_le_bytes([d[0], d[1], d[2], d[3]]), u32::from_le_bytes([d[4], d[5], d[6], d[7]])])
    }

    /// Its words, from the first.
    pub fn words(self) -> impl Iterator<Item = u32> {
        self.words_from(0)
    }

    /// Shuffles by it (Fisher-Yates) from the last place down: place `p` is swapped with one of the places `0..=p`. With `m = p + 1`, a word `w` draws place
    /// `⌊w · m / 2³²⌋`, and is passed over if `w · m mod 2³² < 2³² mod m`: so all places are equally likely.
    pub fn shuffle<T>(self, items: &mut [T]) {
        let mut words = self.words();
        for place in (1..items.len()).rev() {
            items.swap(place, below(place as u64 + 1, &mut words));
        }
    }

    /// Its words, from the first of a block of four.
    fn words_from(self, block: u32) -> impl Iterator<Item = u32> {
        (block..=u32::MAX).flat_map(move |block| philox4x32_10([block, 0, 0, 0], self.0))
    }
}

/// Philox4x32-10, the counter-based generator of Salmon et al., *Parallel random numbers: as easy as 1, 2, 3* (2011).
pub fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let [c0, c1, c2, c3] = counter;
        let (p0, p1) = (0xD251_1F53 * u64::from(c0), 0xCD9E_8D57 * u64::from(c2));
        counter = [(p1 >> 32) as u32 ^ c1 ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ c3 ^ key[1], p0 as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

/// Standard normal noise for image `index` of a concept: `size` values, filling channels, rows and columns in that order. Draw 0 is what the image
/// starts from, draw `n` what is added to it after step `n`, counted from 1, by samplers that add noise.
///
/// Key ("noise", seed, concept, index). A draw takes ⌈size / 4⌉ blocks, and draw `n` starts where the one before it ends. Box-Muller: two words,
/// as numbers `a` and `b`, give `√(−2 ln a) · cos 2πb`, then `√(−2 ln a) · sin 2πb`, each rounded to `f32`. A diffusion model's
/// `init_noise_sigma` is for the caller to multiply by.
pub fn noise(seed: u64, concept: &str, index: u32, draw: u32, size: usize) -> Vec<f32> {
    let key = Key::new(&[b"noise", &number(seed), concept.as_bytes(), &number(index)]);
    let mut words = key.words_from(draw.wrapping_mul(size.div_ceil(4) as u32)).map(uniform);
    let pairs = std::iter::from_fn(|| Some((words.next()?, words.next()?)));
    let normals = pairs.flat_map(|(a, b)| {
        let (radius, angle) = ((-2.0 * a.ln()).sqrt(), std::f64::consts::TAU * b);
        [radius * angle.cos(), radius * angle.sin()]
    });
    normals.map(|normal| normal as f32).take(size).collect()
}

/// The next token of a language model's answer: an index into `logits`. Logits that are NaN or infinite are never drawn; where all are,
/// it is 0.
///
/// Key ("lm", seed, prompt, n, position), where `prompt` is the rendered prompt, `n` says which of the summaries it is (0 when
/// simplifying), and `position` which token of the answer; the number is the first word's. Of softmax(logits / temperature), in the
/// order of ids, it is the first token at which the running sum exceeds that number times the whole. Temperature 0 takes the largest
/// logit, the first of equals.
pub fn token(logits: &[f32], temperature: f32, seed: u64, prompt: &str, n: u32, position: u32) -> u32 {
    let finite = || (0_u32..).zip(logits.iter().copied()).filter(|(_, logit)| logit.is_finite());
    let Some((likeliest, largest)) = finite().reduce(|best, next| if next.1 > best.1 { next } else { best }) else {
        return 0;
    };
    if temperature <= 0.0 {
        return likeliest;
    }
    let weight = |logit: f32| ((f64::from(logit) - f64::from(largest)) / f64::from(temperature)).exp();
    let whole: f64 = finite().map(|(_, logit)| weight(logit)).sum();
    let key = Key::new(&[b"lm", &number(seed), prompt.as_bytes(), &number(n), &number(position)]);
    let target = key.words().next().map_or(0.0, uniform) * whole;
    let mut sum = 0.0;
    let drawn = finite().find(|&(_, logit)| {
        sum += weight(logit);
        sum > target
    });
    drawn.map_or(likeliest, |(id, _)| id)
}

/// Brings a unit's descriptions into the order in which summary `n` (from 0) sees them, given those of the highest activation first: as
/// they are for the first summary, shuffled for the others.
///
/// Key ("shuffle", seed, layer, unit, n). (The authors' shuffles start from the order that the one before has left.)
pub fn shuffle<T>(descriptions: &mut [T], seed: u64, layer: &str, unit: u32, n: u32) {
    if n > 0 {
        Key::new(&[b"shuffle", &number(seed), layer.as_bytes(), &number(unit), &number(n)]).shuffle(descriptions);
    }
}

/// A number below `m` (1 to 2³²), all equally likely.
fn below(m: u64, words: &mut impl Iterator<Item = u32>) -> usize {
    let uneven = (1 << 32) % m;
    words.map(|word| u64::from(word) * m).find(|product| product & 0xFFFF_FFFF >= uneven).map_or(0, |product| (product >> 32) as usize)
}

fn uniform(word: u32) -> f64 {
    (f64::from(word) + 0.5) / 4_294_967_296.0
}

pub(crate) fn number(value: impl Into<u64>) -> [u8; 8] {
    value.into().to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the Random123 library publishes (kat_vectors, philox4x32, 10 rounds).
    #[test]
    fn philox_gives_the_published_answers() {
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox4x32_10([u32::MAX; 4], [u32::MAX; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        let pi = philox4x32_10([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]);
        assert_eq!(pi, [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]);
    }

    #[test]
    fn parts_of_a_key_cannot_run_into_each_other() {
        assert_ne!(Key::new(&[b"ab", b"c"]), Key::new(&[b"a", b"bc"]));
        assert_ne!(Key::new(&[b"abc"]), Key::new(&[b"abc", b""]));
    }

    #[test]
    fn words_that_would_tip_the_scales_are_passed_over() {
        // 2³² mod 6 = 4, and the products with 6 are 0, 2³² + 2 and 3 · 2³² + 6.
        let mut words = [0, 0x2AAA_AAAB, 0x8000_0001, 9].into_iter();
        assert_eq!(below(6, &mut words), 3);
        assert_eq!(words.next(), Some(9));
        assert_eq!(below(1, &mut [7].into_iter()), 0);
        assert_eq!(below(1 << 32, &mut [u32::MAX].into_iter()), u32::MAX as usize);
    }

    #[test]
    fn noise_of_a_later_draw_starts_at_the_block_after_the_one_before_it() {
        let stream = noise(3, "polka dots", 1, 0, 24);
        assert_eq!(noise(3, "polka dots", 1, 1, 8), stream[8..16]);
        assert_eq!(noise(3, "polka dots", 1, 2, 8), stream[16..]);
        assert_eq!(noise(3, "polka dots", 1, 1, 6), stream[8..14], "what is left of a block is passed over");
    }

    #[test]
    fn tokens_without_a_finite_logit_are_never_drawn() {
        let logits = [f32::NAN, -2.0, f32::INFINITY, f32::NEG_INFINITY, -2.0];
        assert_eq!(token(&logits, 0.0, 0, "", 0, 0), 1, "the first of equals");
        let drawn: std::collections::BTreeSet<u32> = (0..64).map(|position| token(&logits, 1.0, 0, "", 0, position)).collect();
        assert_eq!(drawn, [1, 4].into());
        assert_eq!(token(&[f32::NAN; 3], 1.0, 0, "", 0, 0), 0);
        assert_eq!(token(&[], 0.3, 0, "", 0, 0), 0);
    }
}
