//! Describe-and-Dissect as pure functions.
//!
//! The method of Bai, Iyer, Oikarinen and Weng, *Describe-and-Dissect: Interpreting Neurons in Vision Networks with Language Models*,
//! without its models: what is computed before, between and after them. Nothing here reads, waits or keeps anything; equal arguments
//! give equal results. Section, table and step numbers in this crate are the paper's.
//!
//! # The method, and where each part of it is
//!
//! A **unit** (the paper: neuron) is a channel of a convolution, a unit of a fully connected layer, or a dimension of a transformer's
//! token. `A_k(x)` is its **activation map** on image `x`, and `g` the summary function that makes one number of it. The **probing
//! set** `D_probe` is the pictures that units are watched on. Every constant is a field of [`parameters::Parameters`].
//!
//! | paper | here |
//! | --- | --- |
//! | **Step 1**, 3.1: activations over `D_probe` | [`summary`]: `g`; [`top`]: the highest activating images, dead units |
//! | Step 1, A.1.1: attention cropping, `D_cropped` | [`crops`], made of [`canvas`], [`resize`], [`otsu`] and [`contours`] |
//! | **Step 2**, 3.2: the set `I` of `K` images | [`top`] again, over `D_probe ∪ D_cropped` |
//! | Step 2A: captions | (a model's) |
//! | Step 2B, A.1.2: simplify, summarise | [`prompts`] to a language model, [`answers`] from it: the candidate concepts `T` |
//! | **Step 3**, 3.3: `Q` new images of each concept | [`prompts::generate`], [`draw::noise`]; the images are a model's |
//! | Step 3: `Rank`, `H_j` | [`ranks`] |
//! | Step 3, 3.4 and A.1.3: scores, the label | [`score`], with [`embedding`] for what CLIP says |
//! | A.5: several labels | [`labels`] |
//! | 4.3, A.1.5: what people think of labels | [`rating`] |
//!
//! Wherever the method draws at random it draws by key ([`draw`]), so that a draw depends on what it is for and on nothing else.
//! Activations that are NaN or infinite have one place everywhere: they are counted or marked, and never picked.
//!
//! # Departures from the authors' own implementation
//!
//! The text is followed where it speaks, their code where the text is silent; each module says where it follows neither. The main ones:
//! activation maps become bytes by minimum and maximum (theirs multiplies by 255 and wraps around); the canvas keeps the picture's
//! aspect and is what the network saw (theirs squashes the whole picture to 375 × 375); ranks start at 1 and equal activations share
//! one; equal scores go to the earlier candidate, and candidates keep their order (theirs pass through a set); draws are keyed (theirs
//! take from one generator, so that a unit's result depends on the units before it).

pub mod answers;
pub mod boxes;
pub mod canvas;
pub mod contours;
pub mod crops;
pub mod draw;
pub mod embedding;
pub mod grid;
pub mod labels;
pub mod otsu;
pub mod parameters;
pub mod prompts;
pub mod ranks;
pub mod rating;
pub mod resize;
pub mod score;
pub mod summary;
pub mod top;
