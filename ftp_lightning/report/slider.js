const slider = document.getElementById("block");
const story = document.getElementById("story-text");
const name = document.getElementById("block-name");
const words = [...story.querySelectorAll("span[data-keep]")];
function show() {
  const block = Number(slider.value);
  story.classList.toggle("one-block", block > 0);
  let skipped = 0;
  for (const word of words) {
    const skip = block > 0 && word.dataset.keep[block - 1] === "0";
    word.classList.toggle("skip", skip);
    skipped += skip;
  }
  const share = (100 * skipped / words.length).toFixed(1);
  name.textContent = block ? `block ${block}: ${share} % of the tokens skip it (pale)` : "all blocks";
}
slider.addEventListener("input", show);
document.getElementById("slider").hidden = false;
show();
